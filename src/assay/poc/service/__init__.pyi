from .app import attach as attach
from .app import create_app as create_app
from .app import serve as serve
from .receiver import create_receiver as create_receiver
from .settings import Settings as Settings
from .states import State as State
