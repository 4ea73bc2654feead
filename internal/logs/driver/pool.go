package driver

import "time"

const (
	// maxIdleScratch is how many buffers are kept for the next batch.
	maxIdleScratch = 4
	// scratchTimeout is how long a batch waits for buffers of another one when there are no
	// descriptors for new ones.
	scratchTimeout = time.Second
)

// pool keeps the buffers of batches. It is safe for concurrent use.
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

// take returns buffers for a batch. When there are no descriptors for new ones, it waits for those
// of another batch.
func (p *pool) take() (*scratch, error) {
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

// give takes buffers back. If an error has left something in their pipe that cannot be read, they
// are closed.
func (p *pool) give(b *scratch) {
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

	p.alarms.add(alarmPipes, small(b.size))

	return b, nil
}

func (p *pool) discard(b *scratch) {
	p.alarms.add(alarmPipes, -small(b.size))
	b.close()
}

func (p *pool) grow(b *scratch) {
	before := small(b.size)
	b.grow()
	p.alarms.add(alarmPipes, small(b.size)-before)
}

// growIdle lets small pipes grow that no batch uses just now.
func (p *pool) growIdle() {
	for range maxIdleScratch {
		select {
		case b := <-p.idle:
			p.grow(b)
			p.give(b)
		default:
			return
		}
	}
}

// close closes the idle buffers. No batch runs any more.
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
