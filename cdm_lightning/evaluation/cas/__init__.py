"""`cdm cas`: the classification accuracy score of a classifier trained on samples and tested on real images."""
