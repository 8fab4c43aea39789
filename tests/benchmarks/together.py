"An embedding, a siamese network and keypoints of the whale, each alone and blended: held out, and on the test set once"
from functools import partial
from recipes import whale
from recipes.data.whale_folds import id_folds
from recipes.infer.compare import gain_over, verdict
from recipes.infer.embed import by_retrieval
from recipes.recipe.effects import blend
from recipes.recipe.ensemble import out_of_fold
from recipes.whale_pairs import fourth_points, tenth_pair
from plain import answers
from result import Row

SMALL = dict(arch='resnet18', size=(64,128), pretrained=False, stages=(), folds=partial(id_folds, n=4, seed=0, share=.28))

def embeddings(path, seeds, epochs):
    "Out-of-fold scores of an embedding, over as many folds as seeds"
    recipe = whale.house.but(**SMALL, run_folds=tuple(range(seeds)), scorer=by_retrieval, epochs=epochs or 25)
    return whale.cross_validate(path, recipe=recipe)

def siamese(path, runs, epochs):
    "Those of pairs: each fold's network goes on from the weights of the same fold's embedding"
    recipe = tenth_pair.but(**SMALL, resize=(), lr=3e-4, bs=64, epochs=epochs or 12)
    return out_of_fold([whale.train(path, fold=o.fold, recipe=recipe.but(weights=str(o.path/'model.safetensors'))).run for o in runs])

def keypoints(path, seeds):
    "Those of keypoints alone"
    return whale.cross_validate(path, recipe=fourth_points.but(folds=SMALL['folds'], run_folds=tuple(range(seeds))))

def together(path, seeds=0, epochs=0):
    "MAP@5 of a blend, with weights found on the other folds, against each of its members"
    seeds,embedding = seeds or 3,embeddings(path, seeds or 3, epochs)
    return blended(dict(embedding=embedding, siamese=siamese(path, embedding.runs, epochs), keypoints=keypoints(path, seeds)))

def blended(oofs):
    "The blend of members by name, each against it"
    rows,both = [],blend(list(oofs.values()), 'find')
    print(f'weights {dict(zip(oofs, both.weights.round(2).tolist()))}')
    for k,o in oofs.items():
        print(verdict(f'blend against {k} ({o.score():.4f})', *gain_over(both, o)))
        rows.append(Row(f'whale: MAP@5 of a blend, held out (other: {k})', both.score(), o.score(), both.score()/o.score(), '>=1'))
    return [*rows,*on_test(oofs, both)] if (both.table.path/'answers.csv').exists() else rows

def on_test(oofs, both):
    "The same on the test set"
    y,metric = answers(both.table),both.competition.metric
    preds = {k:whale.predict(o.runs) for k,o in oofs.items()}
    ours = metric(y, blend(list(preds.values()), both.weights).decide())
    alone = {k:metric(y, o.decide()) for k,o in preds.items()}
    return [Row(f'whale: MAP@5 of the blend on the test set (other: {k})', ours, o, ours/o, '>=1') for k,o in alone.items()]
