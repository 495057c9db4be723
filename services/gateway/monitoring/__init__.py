"""Production traffic: reported, retained, deleted, watched for change."""
