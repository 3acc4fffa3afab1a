def counterfactual(pairs, model):
    pass
