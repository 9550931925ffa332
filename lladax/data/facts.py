"""Facts to be learnt in one direction and asked in both: the corpus "facts", and its questions.

A third of the facts is told in both directions ("The capital of Peru is Lima." and "Lima is the capital of Peru."), so
that both sentences are known; the others are told forward only. A model that has learnt the sentence, and not just its
continuation, can fill in either end of it.
"""

import dataclasses
import hashlib

_RELATIONS = {
  "capital": ("The capital of {a} is {b}.", "{b} is the capital of {a}."),
  "symbol": ("The chemical symbol of {a} is {b}.", "{b} is the chemical symbol of {a}."),
}

_CAPITALS = """
Afghanistan:Kabul Albania:Tirana Algeria:Algiers Andorra:Andorra_la_Vella Angola:Luanda Argentina:Buenos_Aires
Armenia:Yerevan Australia:Canberra Austria:Vienna Azerbaijan:Baku Bahamas:Nassau Bahrain:Manama Bangladesh:Dhaka
Barbados:Bridgetown Belarus:Minsk Belgium:Brussels Belize:Belmopan Benin:Porto-Novo Bhutan:Thimphu Bolivia:Sucre
Botswana:Gaborone Brazil:Brasília Bulgaria:Sofia Burundi:Gitega Cambodia:Phnom_Penh Cameroon:Yaoundé Canada:Ottawa
Chad:N'Djamena Chile:Santiago China:Beijing Colombia:Bogotá Comoros:Moroni Croatia:Zagreb Cuba:Havana Cyprus:Nicosia
Denmark:Copenhagen Dominica:Roseau Ecuador:Quito Egypt:Cairo Eritrea:Asmara Estonia:Tallinn Eswatini:Mbabane
Ethiopia:Addis_Ababa Fiji:Suva Finland:Helsinki France:Paris Gabon:Libreville Gambia:Banjul Georgia:Tbilisi
Germany:Berlin Ghana:Accra Greece:Athens Grenada:Saint_George's Guinea:Conakry Guyana:Georgetown Haiti:Port-au-Prince
Honduras:Tegucigalpa Hungary:Budapest Iceland:Reykjavik India:New_Delhi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad
Ireland:Dublin Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman Kazakhstan:Astana Kenya:Nairobi Kiribati:Tarawa
Kyrgyzstan:Bishkek Laos:Vientiane Latvia:Riga Lebanon:Beirut Lesotho:Maseru Liberia:Monrovia Libya:Tripoli
Liechtenstein:Vaduz Lithuania:Vilnius Madagascar:Antananarivo Malawi:Lilongwe Malaysia:Kuala_Lumpur Maldives:Malé
Mali:Bamako Malta:Valletta Mauritania:Nouakchott Mauritius:Port_Louis Moldova:Chișinău Mongolia:Ulaanbaatar
Montenegro:Podgorica Morocco:Rabat Mozambique:Maputo Myanmar:Naypyidaw Namibia:Windhoek Nauru:Yaren Nepal:Kathmandu
Netherlands:Amsterdam Nicaragua:Managua Niger:Niamey Nigeria:Abuja Norway:Oslo Oman:Muscat Pakistan:Islamabad
Palau:Ngerulmud Paraguay:Asunción Peru:Lima Philippines:Manila Poland:Warsaw Portugal:Lisbon Qatar:Doha
Romania:Bucharest Russia:Moscow Rwanda:Kigali Samoa:Apia Senegal:Dakar Serbia:Belgrade Seychelles:Victoria
Slovakia:Bratislava Slovenia:Ljubljana Somalia:Mogadishu Spain:Madrid Sudan:Khartoum Suriname:Paramaribo
Sweden:Stockholm Switzerland:Bern Syria:Damascus Tajikistan:Dushanbe Tanzania:Dodoma Thailand:Bangkok Togo:Lomé
Tonga:Nuku'alofa Tunisia:Tunis Turkey:Ankara Turkmenistan:Ashgabat Tuvalu:Funafuti Uganda:Kampala Ukraine:Kyiv
Uruguay:Montevideo Uzbekistan:Tashkent Vanuatu:Port_Vila Venezuela:Caracas Vietnam:Hanoi Yemen:Sana'a Zambia:Lusaka
Zimbabwe:Harare
"""

_SYMBOLS = """
hydrogen:H helium:He lithium:Li beryllium:Be boron:B carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne sodium:Na
magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulphur:S chlorine:Cl argon:Ar potassium:K calcium:Ca scandium:Sc
titanium:Ti vanadium:V chromium:Cr manganese:Mn iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn gallium:Ga germanium:Ge
arsenic:As selenium:Se bromine:Br krypton:Kr rubidium:Rb strontium:Sr yttrium:Y zirconium:Zr niobium:Nb molybdenum:Mo
technetium:Tc ruthenium:Ru rhodium:Rh palladium:Pd silver:Ag cadmium:Cd indium:In tin:Sn antimony:Sb tellurium:Te
iodine:I xenon:Xe caesium:Cs barium:Ba lanthanum:La cerium:Ce praseodymium:Pr neodymium:Nd promethium:Pm samarium:Sm
europium:Eu gadolinium:Gd terbium:Tb dysprosium:Dy holmium:Ho erbium:Er thulium:Tm ytterbium:Yb lutetium:Lu hafnium:Hf
tantalum:Ta tungsten:W rhenium:Re osmium:Os iridium:Ir platinum:Pt gold:Au mercury:Hg thallium:Tl lead:Pb bismuth:Bi
polonium:Po astatine:At radon:Rn francium:Fr radium:Ra actinium:Ac thorium:Th protactinium:Pa uranium:U neptunium:Np
plutonium:Pu americium:Am curium:Cm berkelium:Bk californium:Cf einsteinium:Es fermium:Fm
"""


@dataclasses.dataclass(frozen=True)
class Fact:
  """`a` comes first in the forward sentence, `b` last; `taught`: the backward sentence is in the corpus, too."""

  a: str
  b: str
  forward: str
  backward: str
  taught: bool


def facts() -> list[Fact]:
  """All facts, in a fixed order."""
  found = []
  for relation, table in (("capital", _CAPITALS), ("symbol", _SYMBOLS)):
    for pair in table.split():
      a, b = (x.replace("_", " ") for x in pair.split(":"))
      forward, backward = (template.format(a=a, b=b) for template in _RELATIONS[relation])
      taught = hashlib.blake2b(forward.encode(), digest_size=2).digest()[0] % 3 == 0
      found.append(Fact(a, b, forward, backward, taught))
  return found


def documents() -> list[str]:
  """The sentences that are told."""
  return [text for fact in facts() for text in ([fact.forward, fact.backward] if fact.taught else [fact.forward])]
