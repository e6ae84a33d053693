"""The page at ``/``: one file that shows the service live and needs nothing from elsewhere."""

from assay.poc.service.dashboard._page import SHARED, assemble_page, dashboard_router, page_router, part, render_page

__all__ = ["SHARED", "assemble_page", "dashboard_router", "page_router", "part", "render_page"]
