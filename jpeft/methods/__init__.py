"""The methods, one file each."""

from jpeft.methods.chain import Chain
from jpeft.methods.dora import DoRA
from jpeft.methods.fourierft import FourierFT
from jpeft.methods.ia3 import IA3
from jpeft.methods.lokr import LoKr
from jpeft.methods.lora import LoRA
from jpeft.methods.oft import OFT
from jpeft.methods.pfeiffer import Pfeiffer
from jpeft.methods.selective import BitFit, Full, LayerNormTuning
from jpeft.methods.virtual import PrefixTuning, PromptTuning

__all__ = [
    "IA3",
    "OFT",
    "BitFit",
    "Chain",
    "DoRA",
    "FourierFT",
    "Full",
    "LayerNormTuning",
    "LoKr",
    "LoRA",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
]
