"""What holds a rewrite to its promise: the verifier, the validator, the interpreter, bisection."""
