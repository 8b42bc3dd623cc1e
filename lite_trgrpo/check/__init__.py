"""Before a run: can it learn at all? Data and rewards tried out, the base sampled, prompts measured."""
