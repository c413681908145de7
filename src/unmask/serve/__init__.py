"""An OpenAI-compatible server over any checkpoint and decoder, and a page on which one watches a canvas fill."""
