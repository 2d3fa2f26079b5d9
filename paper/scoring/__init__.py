"""How answers are judged: programs are run, refusals are recognised."""
