"""How time and memory grow with the sizes, and whether `dldr plan` foresees them."""
