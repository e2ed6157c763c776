"""The methods, one file each."""
from jpeft.methods.lora import LoRA
__all__ = ["LoRA"]
