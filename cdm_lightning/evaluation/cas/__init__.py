"""`cdm cas`: the classification accuracy score, a classifier trained on samples and tested on real images."""
