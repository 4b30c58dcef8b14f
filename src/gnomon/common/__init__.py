"""What several pillars need: models, corpora, calibration, linear algebra."""
