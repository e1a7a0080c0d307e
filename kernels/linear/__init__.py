"""Linear layers and look-ups over plain, packed and quantized weights; LoRA's two products."""
