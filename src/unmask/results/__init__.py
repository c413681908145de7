"""``unmask report``: what evaluations, studies and training runs left, as figures and one HTML file."""
