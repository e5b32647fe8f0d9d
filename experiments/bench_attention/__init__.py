"""What does attention cost here, by each route and by the codes around it?"""
