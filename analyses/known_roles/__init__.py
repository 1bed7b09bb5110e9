"""Trained models with heads whose role is known beforehand, outside text: does relevance rank those heads first?"""
