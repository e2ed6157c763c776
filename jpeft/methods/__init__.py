"""The methods, one file each."""

from jpeft.methods.chain import Chain
from jpeft.methods.delora import DeLoRA
from jpeft.methods.dora import DoRA
from jpeft.methods.fourierft import FourierFT
from jpeft.methods.hira import HiRA
from jpeft.methods.ia3 import IA3
from jpeft.methods.loha import LoHa
from jpeft.methods.lokr import LoKr
from jpeft.methods.lora import LoRA
from jpeft.methods.miss import MiSS
from jpeft.methods.oft import OFT
from jpeft.methods.pfeiffer import Pfeiffer
from jpeft.methods.selective import BitFit, Full, LayerNormTuning
from jpeft.methods.vera import VeRA
from jpeft.methods.virtual import PrefixTuning, PromptTuning

__all__ = [
    "IA3",
    "OFT",
    "BitFit",
    "Chain",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "Full",
    "HiRA",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
]
