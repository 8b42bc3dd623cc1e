"""lite-trgrpo: TR-GRPO LoRA fine-tuning of small language models on one GPU."""

__version__ = "0.1.0"
