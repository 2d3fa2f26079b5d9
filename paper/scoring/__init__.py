"""How answers are judged: programs are run, and refusals are recognised."""
