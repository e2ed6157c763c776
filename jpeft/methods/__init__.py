"""The methods, one file each."""

from jpeft.methods.adalora import AdaLoRA
from jpeft.methods.alora import ALoRA
from jpeft.methods.boft import BOFT
from jpeft.methods.bottleneck import AdapterPlus, Houlsby, Pfeiffer
from jpeft.methods.c3a import C3A
from jpeft.methods.chain import Chain
from jpeft.methods.compacter import Compacter
from jpeft.methods.delora import DeLoRA
from jpeft.methods.diffpruning import DiffPruning
from jpeft.methods.dora import DoRA
from jpeft.methods.fourierft import FourierFT
from jpeft.methods.gated import GatedAdapter, GatedLoRA, GatedPrefixTuning
from jpeft.methods.gralora import GraLoRA
from jpeft.methods.hira import HiRA
from jpeft.methods.hra import HRA
from jpeft.methods.ia3 import IA3
from jpeft.methods.kasa import KaSA
from jpeft.methods.llama_adapter import LLaMAAdapter
from jpeft.methods.loha import LoHa
from jpeft.methods.lokr import LoKr
from jpeft.methods.lora import LoRA
from jpeft.methods.lorafa import LoRAFA
from jpeft.methods.miss import MiSS
from jpeft.methods.multitask import MultitaskPromptTuning
from jpeft.methods.oft import OFT
from jpeft.methods.parallel import ParallelAdapter
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.psoft import PSOFT
from jpeft.methods.ptuning import PTuning
from jpeft.methods.randlora import RandLoRA
from jpeft.methods.reft import DiReFT, LoReFT
from jpeft.methods.road import RoAd
from jpeft.methods.selective import BitFit, Full, LayerNormTuning
from jpeft.methods.sparse import SHiRA, WaveFT
from jpeft.methods.tokens import TrainableTokens
from jpeft.methods.vblora import VBLoRA
from jpeft.methods.vera import VeRA
from jpeft.methods.virtual import PromptTuning

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "PSOFT",
    "ALoRA",
    "AdaLoRA",
    "AdapterPlus",
    "BitFit",
    "Chain",
    "Compacter",
    "DeLoRA",
    "DiReFT",
    "DiffPruning",
    "DoRA",
    "FourierFT",
    "Full",
    "GatedAdapter",
    "GatedLoRA",
    "GatedPrefixTuning",
    "GraLoRA",
    "HiRA",
    "Houlsby",
    "KaSA",
    "LLaMAAdapter",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoReFT",
    "MiSS",
    "MultitaskPromptTuning",
    "PTuning",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]
