"""Full lyrics and a genre go in, a whole song comes out."""
