-- Opening and closing windows.

local function new_window(account, term, now)
  local _, finish, grant = window_at(term, now)
  account.epoch = account.epoch + 1
  return {
    book = digits(term.refresh), refresh = term.refresh, finish = finish, granted = grant, used = 0, held = 0, before = 0,
    epoch = account.epoch, first = account.epoch, adopted = 0, adopted_epochs = ''
  }
end

-- The window after one that has ended. What it still holds is held on, but no longer against what is free.
local function next_window(account, window, term, now, postings)
  local opened = new_window(account, term, now)
  opened.first = window.first
  opened.before = window.before + window.held
  local book = opened.book
  local left = window.granted - window.used
  post(postings, 'window:' .. book, opened.granted - left)
  post(postings, 'lapsed:' .. book, left - window.held)
  post(postings, 'before:' .. book, window.held)
  post(postings, 'granted:' .. book, -opened.granted)
  return opened
end

-- A window of a length that the account did not have. It has seen what was used since it began: never more than the
-- whole day's use, nor more than that of a window which began no later. What is in flight is held in it too.
local function first_window(account, term, now, old, postings)
  local opened = new_window(account, term, now)
  local start = opened.finish - opened.refresh
  opened.used = account.day_used
  local parent
  for _, window in ipairs(old) do
    local covers = window.finish - window.refresh <= start and start < window.finish
    if covers then opened.used = math.min(opened.used, window.used) end
    if now < window.finish and (covers or not parent) then parent = window end
  end
  if parent then
    opened.adopted = parent.held + parent.adopted
    local held_in = {}
    if parent.held > 0 then held_in[1] = digits(parent.epoch) end
    if parent.adopted > 0 then held_in[#held_in + 1] = parent.adopted_epochs end
    opened.adopted_epochs = table.concat(held_in, ',')
  end
  post(postings, 'granted:' .. opened.book, opened.used - opened.granted)
  post(postings, 'window:' .. opened.book, opened.granted - opened.used)
  return opened
end

local function close_window(account, window)
  local book, left, postings = window.book, window.granted - window.used, {}
  post(postings, 'window:' .. book, -left)
  post(postings, 'before:' .. book, -window.before)
  post(postings, 'lapsed:' .. book, left + window.before)
  add_entry(account, 'close', book, postings, {})
end

-- Few calls need it, once in a refresh: what is here is defined by those alone.
local function change_windows(account, terms, now) --#on-demand
  local old, new = account.windows, read_windows(terms)
  local epoch = (redis.call('HGET', account.key, 'epoch') or 0) + 0
  account.windows, account.epoch = {}, epoch
  for i, term in ipairs(new) do
    local window, postings = same_length(old, term.refresh), {}
    local opens = not window or now >= window.finish
    if not window then
      window = first_window(account, term, now, old, postings)
    elseif opens then
      window = next_window(account, window, term, now, postings)
    end
    account.windows[i] = window
    if opens then
      add_entry(account, 'refresh', window.book .. ':' .. digits(window.finish), postings, {})
    end
  end
  for _, window in ipairs(old) do
    if not same_length(new, window.refresh) then close_window(account, window) end
  end
  if account.epoch > epoch then change(account, 'epoch', account.epoch) end
end
