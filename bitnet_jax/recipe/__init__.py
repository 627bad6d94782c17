"""Training recipes as parts: each a few lines between the parameters and the network."""

from .deadzone import DeadZone as DeadZone
from .part import Part as Part
from .part import apply as apply
from .part import begin as begin
from .part import finish as finish
from .planned import Planned as Planned
from .residual import Residual as Residual
from .scales import LearnedScales as LearnedScales
from .warmup import WarmUp as WarmUp
