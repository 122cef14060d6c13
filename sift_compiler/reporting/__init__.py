"""What a report holds, and how it is shown: as text, JSON and one HTML page."""
