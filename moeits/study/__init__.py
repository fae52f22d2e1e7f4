"""The study: trained models, their text, and what is measured on them."""
