"""The methods, one file each."""

from jpeft.methods.adalora import AdaLoRA
from jpeft.methods.chain import Chain
from jpeft.methods.delora import DeLoRA
from jpeft.methods.dora import DoRA
from jpeft.methods.fourierft import FourierFT
from jpeft.methods.gralora import GraLoRA
from jpeft.methods.hira import HiRA
from jpeft.methods.ia3 import IA3
from jpeft.methods.kasa import KaSA
from jpeft.methods.loha import LoHa
from jpeft.methods.lokr import LoKr
from jpeft.methods.lora import LoRA
from jpeft.methods.lorafa import LoRAFA
from jpeft.methods.miss import MiSS
from jpeft.methods.oft import OFT
from jpeft.methods.pfeiffer import Pfeiffer
from jpeft.methods.randlora import RandLoRA
from jpeft.methods.selective import BitFit, Full, LayerNormTuning
from jpeft.methods.vblora import VBLoRA
from jpeft.methods.vera import VeRA
from jpeft.methods.virtual import PrefixTuning, PromptTuning

__all__ = [
    "IA3",
    "OFT",
    "AdaLoRA",
    "BitFit",
    "Chain",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "Full",
    "GraLoRA",
    "HiRA",
    "KaSA",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "MiSS",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "VBLoRA",
    "VeRA",
]
