"""Optimizers: Grokfast's filters, Muon and NorMuon, their union, QK-clip, presets, schedules."""

from .grokfast import GrokfastState as GrokfastState
from .grokfast import GrokfastWindowState as GrokfastWindowState
from .grokfast import grokfast_ema as grokfast_ema
from .grokfast import grokfast_ma as grokfast_ma
from .labels import Axes as Axes
from .labels import labels as labels
from .mugrokfast import adamw as adamw
from .mugrokfast import mugrokfast as mugrokfast
from .muon import COEFFICIENTS as COEFFICIENTS
from .muon import muon as muon
from .muon import normalise_rows as normalise_rows
from .muon import orthogonalise as orthogonalise
from .presets import PRESETS as PRESETS
from .presets import preset as preset
from .qk_clip import qk_clip as qk_clip
from .schedules import two_stage as two_stage
