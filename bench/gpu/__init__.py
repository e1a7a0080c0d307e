"""The proof on a GPU machine, in stages that write each row at once."""
