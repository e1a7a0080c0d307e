"""The HTTP application: OpenAI's routes, health, metrics, control and two pages. Nothing here imports torch."""
