"""The denoising page: one HTML file on which a canvas fills step by step."""
