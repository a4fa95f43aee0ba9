"""Makes the committed files that follow from the code: pages, dashboards, alert rules.

``python -m ops.generate`` writes them. The product never imports this package.
"""
