"""From a configuration to a program: model configuration, the step, capture, packs, bisect."""
