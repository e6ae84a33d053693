from . import basis as basis
from . import checks as checks
from . import delta as delta
from . import gradients as gradients
