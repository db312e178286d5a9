"""The story: what is asked (specs), which stages follow from it, and the Prefect flow that runs them."""
