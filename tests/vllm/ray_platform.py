"""A platform of vLLM for workers of Ray on a CPU: the CPU build, with a name for its devices in
Ray.

Without such a name vLLM starts no worker of Ray. A node of Ray may claim a GPU that its host does
not have; workers that are put there compute on the CPU. vLLM finds the platform by an entry point
of ``vllm.platform_plugins``.
"""

from vllm.platforms.cpu import CpuPlatform


class RayPlatform(CpuPlatform):
    """The CPU build, whose workers Ray places where it counts GPUs."""

    ray_device_key = "GPU"


def name():
    """Return the name of the platform; the entry point."""
    return f"{__name__}.RayPlatform"
