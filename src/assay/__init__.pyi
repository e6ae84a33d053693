from . import models as models
from . import poc as poc
from . import stats as stats
from . import streams as streams
from . import vhack as vhack
from ._version import __version__ as __version__
from .errors import AssayError as AssayError
from .models import load_model as load_model
