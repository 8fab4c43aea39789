"Medals at every edge of the table, against shares reckoned in fractions"
from fractions import Fraction
import numpy as np, pytest
from recipes.look.medals import medal, medal_lines

golden = {1:(0,0,0), 2:(0,0,0), 3:(0,0,1), 5:(0,1,2), 10:(1,2,4), 99:(9,19,39), 100:(10,20,40), 249:(10,49,99), 250:(10,50,100), 499:(10,50,100),
    500:(11,50,100), 999:(11,50,100), 1000:(12,50,100), 1499:(12,74,149), 1500:(13,75,150), 2059:(14,102,205), 5000:(20,250,500)}

@pytest.mark.parametrize('teams', golden)
def test_golden(teams): assert tuple(medal_lines(teams).values())==golden[teams]

def test_shares_are_exact():
    for teams in range(1, 3001):
        gold,silver,bronze = medal_lines(teams).values()
        share = lambda s: max([k for k in range(teams+1) if Fraction(k, teams)<=Fraction(s)], default=0) if teams%97==0 else None
        if teams<100 and teams%97==0: assert (gold,silver,bronze)==(share('0.1'),share('0.2'),share('0.4'))
        if teams>=1000 and teams%97==0: assert (silver,bronze)==(share('0.05'),share('0.1')) and gold==10+share('0.002')
        assert 0<=gold<=silver<=bronze<=teams

def test_places():
    assert medal(81, 2059)=='silver'
    for teams in (99,100,249,250,999,1000,2059):
        lines = medal_lines(teams)
        for name in lines:
            assert medal(lines[name], teams)==name
            assert medal(lines[name]+1, teams)!=name
        assert medal(teams, teams) is None and medal(1, teams)=='gold'
    assert medal(np.int64(1), np.int64(100))=='gold'

@pytest.mark.parametrize('place,teams', [(0,10), (11,10), (1.,10), (True,10), (1,0), (1,'10'), (-1,10)])
def test_nonsense_is_refused(place, teams):
    with pytest.raises(ValueError): medal(place, teams)
