from .check_report import CheckReport as CheckReport
from .check_report import CheckSettings as CheckSettings
from .five_checks import check as check
from .five_checks import check_gradients as check_gradients
from .pools import PoolReport as PoolReport
from .pools import check_two_pools as check_two_pools
from .pools import read_pool as read_pool
