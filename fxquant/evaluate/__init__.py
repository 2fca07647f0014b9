"""Quality figures: metrics, the bundled digits data and its classifier, size and bit accounting."""
