from .receiver import create_receiver as create_receiver
from .service_api import attach as attach
from .service_api import create_app as create_app
from .service_api import serve as serve
from .service_settings import ServiceSettings as ServiceSettings
from .states import State as State
