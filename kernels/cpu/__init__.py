"""The CPU's side of every op: C++ kernels, their compiler driver, thread pool, tape and memory."""
