"""What peers tell each other and what each then believes: adverts, directory, routing, standing."""
