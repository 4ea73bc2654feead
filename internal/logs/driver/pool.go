package driver

import "time"

const (
	// maxIdleScratch is the number of buffers kept for the next batch.
	maxIdleScratch = 4
	// scratchTimeout limits the wait for another batch's buffers when there are no descriptors for
	// new ones.
	scratchTimeout = time.Second
)

// pool holds the buffers of batches. It is safe for concurrent use.
type pool struct {
	alarms   *alarms
	pipeSize int // Config.pipeSize
	idle     chan *scratch
}

func newPool(a *alarms, pipeSize int) *pool {
	return &pool{
		alarms:   a,
		pipeSize: pipeSize,
		idle:     make(chan *scratch, maxIdleScratch),
	}
}

// get returns buffers for a batch. Without descriptors for new buffers, it waits for those of
// another batch.
func (p *pool) get() (*scratch, error) {
	select {
	case b := <-p.idle:
		return b, nil
	default:
	}

	b, err := p.open()
	if err == nil {
		return b, nil
	}

	t := time.NewTimer(scratchTimeout)
	defer t.Stop()

	select {
	case b := <-p.idle:
		return b, nil
	case <-t.C:
		return nil, err
	}
}

// put returns buffers to the pool. It closes them if an error has left unreadable data in their
// pipe.
func (p *pool) put(b *scratch) {
	if b.dirty && b.empty() != nil {
		p.discard(b)
		return
	}

	select {
	case p.idle <- b:
	default:
		p.discard(b)
	}
}

func (p *pool) open() (*scratch, error) {
	b, err := newScratch(p.pipeSize)
	if err != nil {
		if isShortage(err) {
			p.alarms.raise(alarmDescriptors)
		}
		return nil, err
	}

	p.alarms.add(alarmPipes, countSmall(b.size))

	return b, nil
}

func (p *pool) discard(b *scratch) {
	p.alarms.add(alarmPipes, -countSmall(b.size))
	b.close()
}

func (p *pool) grow(b *scratch) {
	before := countSmall(b.size)
	b.grow()
	p.alarms.add(alarmPipes, countSmall(b.size)-before)
}

// growIdle grows the small pipes of idle buffers.
func (p *pool) growIdle() {
	for range maxIdleScratch {
		select {
		case b := <-p.idle:
			p.grow(b)
			p.put(b)
		default:
			return
		}
	}
}

// close closes the idle buffers. No batch may run any more.
func (p *pool) close() {
	for {
		select {
		case b := <-p.idle:
			p.discard(b)
		default:
			return
		}
	}
}
