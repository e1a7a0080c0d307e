"""Record a step once, replay it cheaply: the CPU's tape and CUDA graphs behind one protocol."""
