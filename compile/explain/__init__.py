"""What the compiler says of a program: text, JSON and HTML, costs, live memory and collectives."""
