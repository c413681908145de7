"""Reports: figures and one HTML file of evaluations, trainings and studies."""
