"""The page at ``/``: one file that shows the service live and needs nothing from elsewhere."""

from assay.poc.service.dashboard._page import dashboard_router, render_page

__all__ = ["dashboard_router", "render_page"]
