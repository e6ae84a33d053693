from .app import create_app as create_app
from .app import validate as validate
from .settings import ValidatorSettings as ValidatorSettings
