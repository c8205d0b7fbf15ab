"""How the built-in base `mini` and the demo tiles are made."""
