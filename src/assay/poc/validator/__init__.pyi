from .validator_api import create_app as create_app
from .validator_api import validate as validate
from .validator_settings import ValidatorSettings as ValidatorSettings
