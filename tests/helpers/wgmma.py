"""Does a compiled kernel touch registers that the tensor cores still use? `wgmma` runs on while other instructions do: until
WARPGROUP.DEPBAR says that it is done, its left operand may not be written, nor its accumulator read or written. Assemblers
before CUDA 13.3 have got this wrong (triton-lang/triton #11781)."""
import re

_INSTRUCTION = re.compile(r'\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;')
_NO_RESULT = 'ST','BAR','BRA','EXIT','BSSY','BSYNC','WARP','RED','LDGSTS','LDGDEPBAR','DEPBAR','NOP','R2UR','U','CCTL',\
    'MEMBAR','FENCE','ERRBAR','SYNCS','ISETP','FSETP','PLOP','R2P','CALL','RET','BMOV','YIELD','VOTEU'

def _from(name, n): i = int(name.lstrip('R')); return set(range(i, i+n))

def _width(op): # registers that a load writes, or a store reads
    mods = op.split('.')
    return 4 if {'128'} & set(mods) or op.startswith(('LDSM','STSM')) and mods[-1]=='4' else 2 if {'64','WIDE'} & set(mods) else 1

def _touched(op, args):
    "Registers that an instruction writes, and those that it reads."
    write,read = set(),set()
    for i,a in enumerate(args):
        names,result = re.findall(r'\bR\d+', a),(i==0 and not op.startswith(_NO_RESULT)) or (op.startswith('SHFL') and i==1)
        if result and re.match(r'R\d', a): write |= _from(names[0], _width(op))
        else:
            for n in names: read |= _from(n, _width(op) if op.startswith('ST') else 2 if '.64' in a or 'WIDE' in op and i==3 else 1)
    return write, read

def touched_early(
    sass:str, # What `nvdisasm -c` says
)->tuple: # Instructions that touch what is in use; how many products there are; how many of them have their left operand in registers
    "Walk along the instructions in their order and keep what each product in flight uses."
    found,flight,group,products,left = [],[],[],0,0
    for m in filter(None, map(_INSTRUCTION.match, sass.split('\n'))):
        at,op,args = m[1],m[2],[a.strip().replace('.reuse', '') for a in m[3].split(',')]
        using = [p for g in (*flight, group) for p in g]
        if op.startswith('HGMMA'):
            acc = _from(args[0], int(op.split('.')[1].split('x')[1])//2)
            a = _from(args[1], 4) if re.fullmatch(r'R\d+', args[1]) else set()
            products,left = products + 1,left + bool(a)
            if any(acc & a_ or a & acc_ or (acc & acc_ and acc!=acc_) for acc_,a_ in using): found.append((at, op))
            group.append((acc, a))
            if any(x.startswith('gsb') for x in args): flight.append(group); group = []
        elif op.startswith('WARPGROUP.DEPBAR'): flight = flight[len(flight) - n:] if (n := int(args[-1], 16)) else []
        elif using:
            write,read = _touched(op, args)
            if any(write & (a | acc) or read & acc for acc,a in using): found.append((at, op))
    return found, products, left
